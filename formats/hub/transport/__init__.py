"""How bytes come from the Hub: sessions, links, ranges, Xet, patience and limits."""
