"""How bytes come from the Hub: sessions, links, ranges, Xet, backoff and limits."""
