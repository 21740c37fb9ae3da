"""Plumbing shared by the stages. Nothing in here is specific to the method."""
