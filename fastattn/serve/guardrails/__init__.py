"""Guards over what goes in and what comes out, streams included."""

from fastattn.serve.guardrails.config import GuardrailsConfig as GuardrailsConfig
from fastattn.serve.guardrails.guardrails import Guardrails as Guardrails
from fastattn.serve.guardrails.guardrails import build_guardrails as build_guardrails
