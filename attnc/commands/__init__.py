"""One file per command of the command line; `attnc.cli` lists them."""
