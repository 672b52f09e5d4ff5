"""One module per table or figure of the QLoRA paper: `python -m experiments.paper.NAME --help`."""
