"""The definitions: one module per operator, plain differentiable torch that every kernel is checked
against."""
