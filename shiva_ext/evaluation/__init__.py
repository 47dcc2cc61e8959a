"""How good and how fast generated images are: distances, accuracies, and the cost of a forward pass."""
