"""For all tests: Hypothesis does not measure time, since a busy machine is no counterexample."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "llmux", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("llmux")
