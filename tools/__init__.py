"""Commands of their own that use the stages: survey, sweep, export, profile."""
