"""Builders of tiny models, by kind; ``models.CASES`` holds them all."""
