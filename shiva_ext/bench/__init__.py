"""Small experiments that show what the method's parts do, each with a function ``run``."""
