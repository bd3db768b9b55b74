"""The recorded run -> axes, groups and what is frozen."""
