"""What knows of other libraries. Nothing here is imported by the rest of depgraph, but by name where a user asks for it."""

PRETRAINED = "depgraph.integrations.hugging_face"  # folders of pretrained models
QUANTISATION = "depgraph.integrations.quantisation"  # quantised weights
PRETRAINED_FILES = "depgraph.integrations.hugging_face_files"  # the same, read and written as streams
