"""The small real model and data that every method of this project is proven on."""
