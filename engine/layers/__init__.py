"""The building blocks of models: `Operation`s, and blocks made of them."""
