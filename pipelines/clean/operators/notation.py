"""Texts in no natural language that are answers all the same: code, formulas, data, numbers."""

import unicodedata

import regex

_PLAIN_QUOTES = str.maketrans("“”‘’", "\"\"''")
_STRING = regex.compile(r'"""(?s:.*?)"""|"[^"\n]*"|\'[^\'\n]*\'')
_COMMENT = regex.compile(r"/\*(?s:.*?)\*/|(?m:(?:#|//|--)\s.*$)|```\w*")
_KEYWORDS = regex.compile(
    r"\b(?:and|as|break|case|catch|class|const|continue|def|do|elif|else|except|final|finally|for|from|function|if|"
    r"import|in|int|is|lambda|let|new|not|null|None|or|print|private|public|return|self|static|String|switch|this|"
    r"True|False|try|var|void|while|with|[A-Z]{2,})\b"
)
_PROSE = regex.compile(r"\b[A-Za-z]{2,}[,.]?(?: +[A-Za-z]{2,}[,.]?){2,}")
"""Three words in a row that are no keywords."""
_OPERAND = r"(?<![A-Za-z])(?:[A-Za-z]|\d+(?:\.\d+)?)(?![A-Za-z])"
_STRUCTURE = regex.compile(
    r"[\w)\]}]\s*(?:[=<>≤≥≈≠→⇒]|[-=:]>)=?\s*[\w(\[{\"'√∞-]"  # an assignment, an equation, a comparison
    rf"|{_OPERAND}\s*[+\-*/^×÷·]\s*[(√]?{_OPERAND}|\)\s*[+\-*/^×÷·]?\s*\("  # a term
    r"|\w\([^()\n]*\)[;:.]?\s*(?:$|\n|#|//)"  # a call or a head that ends its line
    r"|(?s:^\s*[\[{].*[\]}]\s*$)"  # a list or an object
    r"|\b(?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER)\b(?s:.+)\b(?:FROM|INTO|SET|TABLE|VIEW|INDEX)\b"
    r"|^\s*\^.*\$\s*$"  # a regular expression
    r"|(?m:^[^|\n]*\|[^|\n]+\|.*\n[^|\n]*[-|]{3})"  # a table
)
_FOREIGN = regex.compile(r"[^\P{L}A-Za-z\p{Greek}\p{Han}]")
MOSTLY_DIGITS, ENOUGH_ALPHANUMERIC, LITTLE_PROSE = 0.5, 0.3, 0.2


def is_notation(text: str) -> bool:
    """Whether a text is code, a formula, data or numbers.

    Comments and strings in it may be in any language. Words in a row are prose, marks without letters and digits
    between them are noise, and letters outside ASCII and Greek, other than Chinese words in strings, are a language.
    """
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN_QUOTES)
    bare = _COMMENT.sub("", _STRING.sub('""', text))
    visible = regex.sub(r"\s", "", bare)
    if not visible:
        return False
    if sum(character.isdigit() for character in visible) >= MOSTLY_DIGITS * len(visible):
        return True
    if sum(character.isalnum() for character in regex.sub(r"\s", "", text)) < ENOUGH_ALPHANUMERIC * len(visible):
        return False
    if _FOREIGN.search(bare) or not _STRUCTURE.search(text):
        return False
    prose = sum(map(len, _PROSE.findall(_KEYWORDS.sub(";", bare))))
    return prose <= LITTLE_PROSE * len(visible)
