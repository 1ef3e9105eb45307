"""The training engine behind the command line: from a recipe to a run folder with the compressed file."""
