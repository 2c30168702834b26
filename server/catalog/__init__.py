"""models.yaml: which models there are, under which names, and how to run them."""

from server.catalog.model import Catalog, CatalogError, Model, Overrides
from server.catalog.read import load_catalog
from server.catalog.source import model_from_source

__all__ = ["Catalog", "CatalogError", "Model", "Overrides", "load_catalog", "model_from_source"]
