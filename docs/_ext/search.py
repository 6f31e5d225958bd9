"""Search that finds numbers: "0.9677083", "5,366,016", "5366016", "64" and "NF4" are words, and each Chinese character is one.

Sphinx's own cuts a query at the point and at the comma, and drops what is left if it is digits only. The words of the pages and of the
query are cut by the same expression, which Python and JavaScript read alike. A whole number is one word with or without its commas:
"5366016" is "5,366,016", and a number that has none gets one at its end, since Sphinx drops a query's digits.
"""

import re

from sphinx.search.en import SearchEnglish

WORD = r"[0-9]+(?:[.,][0-9]+)+|[㐀-鿿]|[^\W㐀-鿿]+"
COMMAS = r"\B(?=(?:[0-9]{3})+$)"  # where they belong


def canonical(word):
    """A word as search keeps it: digits with commas, anything else as it is."""
    if not re.fullmatch("[0-9]+", word):
        return word
    return re.sub(COMMAS, ",", word) if len(word) > 3 else f"{word},"


class Search(SearchEnglish):
    """English, and numbers."""

    lang = "en"
    # \w is ASCII in JavaScript, so letters and digits are named there. Excerpts show a number as the page writes it.
    js_splitter_code = (
        """
function splitQuery(query) {
    const words = query.match(/[0-9]+(?:[.,][0-9]+)+|[\\u3400-\\u9fff]|(?:(?![\\u3400-\\u9fff])[\\p{L}\\p{N}_])+/gu) || [];
    return words.map((word) => !/^[0-9]+$/.test(word) ? word : word.length > 3 ? word.replace(/COMMAS/g, ",") : word + ",");
}
const summary = Search.makeSearchSummary;
Search.makeSearchSummary = (page, words, anchor) =>
    summary(page, [...words].flatMap((word) => [word, word.replaceAll(",", "")]), anchor);
"""
    ).replace("COMMAS", COMMAS)

    def split(self, input):
        return [canonical(word) for word in re.findall(WORD, input)]


def setup(app):
    app.add_search_language(Search)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
