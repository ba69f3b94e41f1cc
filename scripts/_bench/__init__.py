"""Measurements: one module per subcommand of scripts/bench."""
