"""The page of `mergekit-neuron ui`: a form that writes a YAML, and the commands that run it."""
