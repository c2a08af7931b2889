"""Where this package meets mergekit: the seam, architecture definitions, the plan of a merge, the merge itself."""
