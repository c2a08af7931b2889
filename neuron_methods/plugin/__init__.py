"""Where this package meets mergekit: registration, architecture definitions, the plan of a merge, the merge itself."""
