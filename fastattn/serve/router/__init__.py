"""One endpoint over several models."""

from fastattn.serve.router.config import RouterConfig as RouterConfig
from fastattn.serve.router.router import Router as Router
from fastattn.serve.router.router import build_router as build_router
