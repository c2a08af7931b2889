"""Below all rooms: errors, text for messages and tables, files, stages, YAML with its lines, progress, silence."""
