"""What a merge did to the neurons, in figures: statistics of one weight, a JSON of them all, figures, pages."""
