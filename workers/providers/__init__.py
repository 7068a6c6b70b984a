"""Payment providers: what each one's webhooks prove and say, as facts of one vocabulary (payments: from event to fact).

Nothing here reads a clock, a database, a broker or the network: bytes, headers and time go in, facts come out. What an
adapter needs from the provider's API or a certificate's address is fetched by callables that it is given.
"""
