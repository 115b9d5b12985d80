"""What serving engines load to run MoHGE models. Imports neither `mohge`, which needs a newer transformers than they
have, nor an engine: it is installed beside one with `pip install --no-deps`."""
