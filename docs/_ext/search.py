"""Search that finds numbers: "0.9677083", "5,366,016" and "NF4" are words, and each Chinese character is one.

Sphinx's own cuts a query at the point, and drops what is left if it is digits only. The words of the pages and of the query are cut by the
same expression, which Python and JavaScript read alike.
"""

import re

from sphinx.search.en import SearchEnglish

WORD = r"[0-9]+(?:[.,][0-9]+)+|[㐀-鿿]|[^\W㐀-鿿]+"


class Search(SearchEnglish):
    """English, and decimal numbers."""

    lang = "en"
    # \w is ASCII in JavaScript, so letters and digits are named there
    js_splitter_code = """
function splitQuery(query) {
    return query.match(/[0-9]+(?:[.,][0-9]+)+|[\\u3400-\\u9fff]|(?:(?![\\u3400-\\u9fff])[\\p{L}\\p{N}_])+/gu) || [];
}
"""

    def split(self, input):
        return re.findall(WORD, input)


def setup(app):
    app.add_search_language(Search)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
