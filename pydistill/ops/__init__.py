"""One module per operator: formula, public function, reference, schema, autograd."""
