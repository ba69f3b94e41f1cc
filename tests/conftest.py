"""For all tests: Hypothesis does not measure time, since a busy machine is no counterexample."""

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # in a guest, into which only pytest is carried
else:
    settings.register_profile(
        "llmux", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.load_profile("llmux")
