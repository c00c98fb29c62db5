"""Steering: the hooks that apply interventions to a model, and generation under them."""
