"""Pure functions on tensors. Nothing here reads a file, knows mergekit, or looks at a configuration."""
