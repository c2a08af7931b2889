"""From rows of a data set to batches that a model reads: what profiling, routing and evaluation feed on."""
