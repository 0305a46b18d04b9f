"""One call: the reference formulas, the plan, the public functions and the operators that they call."""
