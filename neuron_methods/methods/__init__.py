"""The merge methods, one file per name in the YAML."""
