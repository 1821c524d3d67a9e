"""Guards that need the whole text: an output schema, and names by Presidio."""

from __future__ import annotations

from typing import Any

from fastattn.serve.guardrails.config import PresidioGuardConfig
from fastattn.serve.guardrails.guard import Finding, Scan
from fastattn.serve.json_body import parse_text


class SchemaGuard:
    is_linear = False
    needs_whole_text = True
    most_per_second: int | None = None

    def __init__(self, schema: dict[str, Any]) -> None:
        """Raises ValueError for a schema that is none, or that refers to anything outside itself."""
        import jsonschema_rs

        try:
            # A pattern in a schema runs in linear time, and nothing is fetched.
            options = jsonschema_rs.RegexOptions()
            self._validator = jsonschema_rs.validator_for(schema, offline=True, pattern_options=options)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            raise ValueError(f"json_schema: {str(error).splitlines()[0]}") from None

    def scan(self, text: str, start: int, final: bool) -> Scan:
        try:
            value = parse_text(text[start:])
        except (ValueError, RecursionError):
            return Scan([Finding(start, len(text), "not_json")], len(text))
        is_valid = self._validator.is_valid(value)
        return Scan([] if is_valid else [Finding(start, len(text), "schema")], len(text))


class PresidioGuard:
    is_linear = False
    needs_whole_text = True
    most_per_second: int | None = 20_000

    def __init__(self, config: PresidioGuardConfig) -> None:
        """Raises ImportError that names the extra, ValueError for a pipeline that is not installed."""
        try:
            import spacy.util
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NlpEngineProvider
        except ImportError:
            raise ImportError(f"guard {config.name!r} needs presidio: pip install 'fastattn[guard]'") from None
        if not spacy.util.is_package(config.model):
            raise ValueError(f"guard {config.name!r}: the spaCy pipeline {config.model!r} is not installed")
        models = [{"lang_code": config.language, "model_name": config.model}]
        engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine()
        self._analyzer: Any = AnalyzerEngine(nlp_engine=engine, supported_languages=[config.language])
        # It would fetch a list of domain endings; e-mail addresses are the pii guard's.
        self._analyzer.registry.remove_recognizer("EmailRecognizer")
        self._config = config
        unknown = sorted(set(config.entities) - set(self._analyzer.get_supported_entities(config.language)))
        if unknown:
            raise ValueError(f"guard {config.name!r}: entities {', '.join(unknown)} are not known to presidio")

    def scan(self, text: str, start: int, final: bool) -> Scan:
        c = self._config
        results = self._analyzer.analyze(
            text[start:], language=c.language, entities=c.entities, score_threshold=c.score
        )
        found = [Finding(start + r.start, start + r.end, r.entity_type.lower()) for r in results]
        return Scan(sorted(found, key=lambda f: (f.start, -f.end)), len(text))
