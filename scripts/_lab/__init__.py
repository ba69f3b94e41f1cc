"""The lab: throw-away Debian guests with a real systemd, for tests, demos and benchmarks."""
