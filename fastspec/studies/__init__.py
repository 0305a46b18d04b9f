"""Studies that use the library as its users do: GLUE, analysis of weights and runs, serving."""
