"""Below all rooms: errors, files, silence of packages underneath."""
