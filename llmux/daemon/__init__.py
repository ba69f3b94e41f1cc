"""The composition root: the only package that knows all others. Builds the three ways to run llmux.

``supervise``: llmux.service, root. ``gateway``: llmux-gateway.service. ``serve``: both in one
process on plain child processes, for laptops, demos and tests. Nothing is imported here: what one
of them needs would stay in the memory of the others.
"""
