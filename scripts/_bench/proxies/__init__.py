"""What ``bench proxy`` compares, and the programs that drive it."""
