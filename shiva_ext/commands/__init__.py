"""The commands of ``shiva``, each module a few."""
