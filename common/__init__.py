"""Plumbing shared by the stages: settings, files, rows, models, scores."""
