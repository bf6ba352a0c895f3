"""From a plan to an engine and back to a callable: export, build, verify, open."""
