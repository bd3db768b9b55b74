"""What knows of other libraries. Nothing here is imported by the rest of depgraph."""
