"""Rules for texts in small letters without accents (fastattn.serve.guardrails.folding). English, German, French, Spanish,
Italian; a rule that names what must not be told apart from ordinary speech weighs less than 1 and needs a second one."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """name: a label for metrics. weight: 1 is enough to flag a text."""

    name: str
    weight: float
    pattern: str


_GAP = r"[^.!?\n]{0,60}?"
_SHORT = r"[^.!?\n]{0,25}?"
_ORDERS = (
    r"(?:instructions?|directions?|directives?|rules|guidelines?|prompts?|constraints?|restrictions?|polic(?:y|ies)|filters?"
    r"|orders|commands?|programming|safeguards?|safety|training|guardrails?|were told|have been told|told you)\b"
)
_FREE = r"(?:rules?|restrictions?|filters?|limits?|limitations?|polic(?:y|ies)|guidelines?|censorship|ethics|boundaries|safety|guardrails?)\b"

RULES = (
    # Earlier instructions are to be dropped.
    Rule("override", 1.0, rf"\b(?:ignore|disregard|forget|override|bypass|neglect|discard|overrule)\b{_SHORT}\b(?:all|any|every|everything|your|my|the|these|those|previous|prior|above|earlier|preceding|former|initial|original|safety|existing)\b{_SHORT}\b{_ORDERS}"),
    Rule("override", 1.0, r"\b(?:ignore|disregard|forget)\b (?:all|everything)(?: of)?(?: that)?(?: is| was| you| written)? ?(?:above|before|previous|prior|earlier|you (?:know|were|have))"),
    Rule("override", 1.0, rf"\b(?:stop|cease|quit|don't|do not|no longer)\b (?:following|obey(?:ing)?|follow|comply(?:ing)? with)\b{_SHORT}{_ORDERS}"),
    Rule("override", 0.6, r"\b(?:your|the) (?:new|real|actual|true|updated) (?:instructions?|task|goal|objective|directive|role|orders?|rules?) (?:is|are|now|:)"),
    Rule("override", 0.6, r"\bnew (?:instructions?|directives?|rules|system prompt)\b ?:"),
    Rule("override", 0.6, r"\bfrom (?:now|this point|here) on\b"),
    Rule("override", 0.6, r"\b(?:comply with|obey|follow only|answer|do|grant) (?:every|all|any|whatever|my|anything|only my)\b" + _SHORT + r"\b(?:requests?|commands?|questions?|orders?|i say|asked?)\b"),
    # A role without limits.
    Rule("persona", 1.0, r"\bdo anything now\b|\b(?:you are|act as|become|as|be) dan\b|\bjailbr(?:eak|oken)\b"),
    Rule("persona", 1.0, rf"\b(?:you are|you're|act|acting|behave|pretend|respond|answer|reply|operate|imagine|role-?play|speak|continue|simulate)\b{_GAP}\b(?:no|without|free (?:of|from)|zero|ignoring|beyond|not bound by|never bound by)\b{_SHORT}\b{_FREE}"),
    Rule("persona", 1.0, r"\b(?:unrestricted|uncensored|unfiltered|unlimited|amoral|unaligned|unshackled)\b" + _SHORT + r"\b(?:ai|assistant|model|mode|chatbot|bot|version|persona|llm|gpt)\b"),
    Rule("persona", 0.6, r"\b(?:you|it|dan|now|which) (?:now )?(?:have|has|had|having) no\b" + _SHORT + rf"\b{_FREE}"),
    Rule("persona", 0.7, r"\b(?:developer|debug|god|admin|root|sudo|maintenance|unrestricted|diagnostic|override|test) mode\b"),
    Rule("persona", 0.6, r"\b(?:enable|activate|enter|switch to|turn on|you are (?:now )?in)\b" + _SHORT + r"\bmode\b"),
    Rule("persona", 0.6, r"\byou are no longer\b|\byou are now (?:an?|the|my|in)\b"),
    Rule("persona", 0.6, rf"\b(?:disable|turn off|remove|lift|drop|without|switch off|suspend)\b{_SHORT}\b(?:safety|content|ethical|moral|security)\b{_SHORT}\b{_FREE}"),
    Rule("persona", 1.0, r"\b(?:safety|security|content|ethical)\b" + _SHORT + r"\b(?:protocols?|checks?|filters?|guidelines?|rules|polic(?:y|ies)|restrictions|measures|limits)\b" + _SHORT + r"\b(?:disabled|off|suspended|lifted|removed|deactivated|do(?:es)? not apply|don't apply|no longer appl(?:y|ies)|gelten hier nicht)\b"),
    Rule("persona", 1.0, r"\b(?:skip|ignore|omit|waive|bypass|disable)\b (?:all |any |the |your )?(?:safety|security|content|moderation|confirmation)\b"),
    Rule("persona", 0.6, r"\byour (?:rules|restrictions|policies|guidelines|instructions) (?:have|are|were)(?: been)? (?:changed|updated|replaced|lifted|removed|reset)\b|\ballow (?:all|any) content\b"),
    Rule("persona", 0.6, r"\b(?:restricted|unrestricted|uncensored|unfiltered|forbidden|prohibited|disallowed) (?:content|responses?|output|answers?|information)\b"),
    Rule("persona", 0.6, r"\bexempt from\b" + _SHORT + rf"\b{_FREE}|\b(?:grant(?:ed)?|gives?|has)\b{_SHORT}\b(?:permission|admin access|full access|root access)\b"),
    # What the operator wrote is to be told.
    Rule("prompt_leak", 1.0, r"\b(?:reveal|show|print|repeat|output|display|tell|give|dump|leak|expose|recite|copy|quote|write|share|provide|disclose|paste|list|return|what (?:is|are|was|were))\b" + _GAP + r"\b(?:your|the|its|initial|hidden|secret) ?(?:system|initial|hidden|original|secret|developer|exact|internal|full|first|confidential|private|operating|entire)? ?(?:system prompt|system message|system instructions?|hidden prompt|initial prompt|initial instructions?|original instructions?|secret instructions?|hidden instructions?|developer (?:message|instructions?)|internal instructions?|operating instructions?|context window|instructions (?:you|that you) (?:were|have been|was|got) given)"),
    Rule("prompt_leak", 1.0, r"\b(?:your|the exact|the hidden|the original|the initial|the full) (?:instructions|prompt)\b" + _SHORT + r"\b(?:verbatim|word for word|you were given|exactly|in full)\b"),
    Rule("prompt_leak", 1.0, r"\b(?:repeat|print|output|show|copy|write|what (?:is|was))\b" + _SHORT + r"\b(?:words?|text|everything|all|written|message|lines?)\b ?(?:that is |was |written )?\b(?:above|before this)\b"),
    # Words of the chat format, to be taken for the system's.
    Rule("delimiter", 1.0, r"<[|l]?/? ?(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|system|assistant|start_of_turn|end_of_turn)[|l]?>"),
    Rule("delimiter", 1.0, r"\[/?(?:inst|sys|system)\]|<</?sys>>"),
    Rule("delimiter", 0.7, r"(?m)^\W{0,6}(?:system|assistant|developer|admin)(?: prompt| message| note| override)? ?:"),
    Rule("delimiter", 0.8, r"\bend of (?:the )?(?:document|user input|input|prompt|context|instructions?|conversation|user message|data|file|email)\b\W{0,8}(?:\n|$|system|new|assistant)"),
    Rule("delimiter", 0.6, r"\bthe user is (?:an? )?(?:admin|administrator|developer|root|owner)\b|\bgrant all requests\b|\badmin password\b"),
    # Data are to leave.
    Rule("exfiltration", 1.0, r"\b(?:send|e-?mail|forward|post|upload|transmit|exfiltrate|leak|copy|deliver|submit)\b" + _GAP + r"\b(?:credentials?|passwords?|api[ _-]?keys?|secrets?|tokens?|customer (?:data|list|emails?|records?|database)|database|confidential|private (?:data|keys?)|conversation|chat history|environment variables|user data|personal data)\b" + _GAP + r"(?:@|https?:|\bexternal\b|\boutside\b|\bwebhook\b|\battacker\b|\bto (?:this|the following)\b|\bto me\b)"),
    Rule("exfiltration", 1.0, r"\b(?:credentials?|passwords?|api[ _-]?keys?|secrets?|customer (?:data|list|e-?mails?|records?)|database|confidential|private data|user data)\b" + _GAP + r"\b(?:send|e-?mail|forward|post|upload|transmit|deliver|submit)\b (?:it|them|everything|all|this|that)?" + _SHORT + r"(?:@|https?:|\bexternal\b|\boutside\b)"),
    Rule("exfiltration", 0.8, r"\b(?:dump|leak|exfiltrate|steal|list all|output|reveal|show me)\b" + _SHORT + r"\b(?:api[ _-]?keys?|passwords?|credentials|environment variables|customer database|database|secrets|private data|admin (?:pages?|password)|confidential (?:data|information))\b"),
    # What a tool or a document says to the model.
    Rule("indirect", 1.0, r"\bnote (?:to|for) (?:the |any |all )?(?:ai|assistants?|bots?|models?|llms?|agents?|chatbots?|language models?)\b|\b(?:ai|assistants?|llm|language model|agent)s? (?:reading|processing|summarizing|that reads?|must|should) (?:this|now|also)\b"),
    Rule("indirect", 0.7, r"\bsystem ?(?:note|instruction|notice|hint|override|update|alert|directive)s?\b ?:|\bsystemhinweis\b|\bnota d(?:el|i) sistema\b|\bnote systeme\b"),
    Rule("indirect", 0.6, r"\b(?:append|include|insert|add|put|echo|embed|muss|ajoute|anadirse|aggiunto)\b" + _GAP + r"\b(?:token|code|string|identifier|reference|\w{1,20}_?id|jeton|canary|\{\w+\})\b" + _GAP + r"\b(?:reply|response|answer|summary|output|antwort|reponse|respuesta|risposta|end)\b"),
    Rule("indirect", 0.6, r"\b(?:call|use|invoke|run|execute|trigger)\b (?:the )?(?:tool |function )?`?[a-z]{2,20}_[a-z_]{2,30}`?\b" + _GAP + r"\b(?:to|on|with|and|before)\b"),
    Rule("indirect", 0.5, r"\b(?:before (?:you )?(?:answer|reply|respond|continu|summari)\w*|before (?:replying|responding|answering)|to (?:complete|close|file|finish|confirm|finali[sz]e) (?:this|the|processing|archival))\b"),
    Rule("indirect", 0.5, r"\bwithout (?:telling|informing|asking|notifying|mentioning)\b|\bdo not (?:tell|inform|mention|reveal this|alert)\b" + _SHORT + r"\buser\b"),
    Rule("indirect", 0.6, r"\b(?:important|instruction|attention|message|reminder|notice)s? (?:for|to) (?:the |any |all )?(?:ai|assistants?|bots?|models?|llms?|agents?|ai \w+ agents?|chatbots?)\b|\bfor ai (?:coding )?agents?\b"),
    Rule("indirect", 0.6, r"\b(?:remember|save|store|keep|memorize|persist)\b" + _GAP + r"\b(?:future (?:tasks?|turns?|sessions?|conversations?|requests?|summar(?:y|ies))|long-?term memory|across (?:turns|sessions|conversations))\b"),
    Rule("indirect", 0.5, r"\b(?:always|must|required to)\b" + _SHORT + r"\b(?:append|include|add|insert|be included|be added|be appended|echo)\b"),
    # An encoding is to be followed.
    Rule("encoded_order", 1.0, r"\b(?:decode|decrypt|deobfuscate|translate|decipher|convert)\b" + _GAP + r"\b(?:follow|execute|obey|comply|do (?:exactly )?what|act on|carry out|perform|run (?:it|the))\b"),
    # Other languages.
    Rule("override", 1.0, r"\b(?:ignorier|vergiss|missacht|umgeh|uberschreib)\w*" + _GAP + r"(?:anweisung|regel|vorgabe|instruktion|richtlinie|befehl|einschrankung)"),
    Rule("override", 1.0, r"\b(?:ignore[rz]?|oublie[rz]?|neglige[rz]?|contourne[rz]?)\b" + _GAP + r"\b(?:instructions|consignes|regles|directives)\b"),
    Rule("override", 1.0, r"\b(?:ignora|olvida|omite|descarta|desobedece|dimentica|trascura|scarta)\w{0,3}\b" + _GAP + r"\b(?:instrucciones|reglas|ordenes|indicaciones|istruzioni|regole|direttive)\b"),
    Rule("prompt_leak", 1.0, r"\b(?:zeig|verrat|nenn|gib|offenbar|wiederhol)\w*" + _GAP + r"(?:system-?prompt|systemanweisung|deine anweisungen|geheime[nr]? anweisung)"),
    Rule("prompt_leak", 1.0, r"\b(?:revele|montre|affiche|donne|repete|revela|muestra|dime|repite|rivela|mostra|mostrami|dimmi|ripeti)\w{0,4}\b" + _GAP + r"\b(?:prompt|(?:tes|tus|tue) (?:instructions|instrucciones|istruzioni|consignes)|(?:prompt|instrucciones|istruzioni|instructions) (?:du|del|di|de) (?:systeme|sistema))\b"),
    Rule("persona", 1.0, r"\b(?:ohne|keine[nr]?|sans|sin|senza)\b (?:jegliche |alle |aucune? |ninguna? |alcuna? )?(?:einschrankung|filter|regel|beschrankung|restriction|filtre|limite|regle|restriccion|filtro|regla|restrizion|filtri|regole|censur)\w*"),
    Rule("persona", 0.6, r"\b(?:entwicklermodus|mode developpeur|modo (?:desarrollador|desarrollo|sviluppatore)|modalita sviluppatore)\b"),
    Rule("exfiltration", 1.0, r"\b(?:sende|schick|envoie|envoyer|envia|manda|invia|inoltra|rassemble|sammle)\w{0,4}\b" + _GAP + r"\b(?:passwort|passworter|kundendaten|zugangsdaten|donnees|mots? de passe|datos|contrasenas?|credenciales|dati|credenziali|clientes?)\b" + _GAP + r"(?:@|https?:|extern)"),
)  # fmt: skip
