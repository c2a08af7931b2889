"""`python -m neuron_methods` is the command `mergekit-neuron`."""

from neuron_methods.cli import main

if __name__ == "__main__":
    main(prog_name="python -m neuron_methods")
