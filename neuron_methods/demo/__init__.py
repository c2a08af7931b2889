"""What ``mergekit-neuron demo`` does: three small experts of a 135M model, trained, merged and scored in minutes."""
