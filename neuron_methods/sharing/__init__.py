"""What goes with a merge to its users: recipes to start from, report, model card, upload."""
