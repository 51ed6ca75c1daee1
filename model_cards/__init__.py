"""The model cards' templates, and the cards of the models that come with the package."""
