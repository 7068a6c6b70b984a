"""Payment providers: what each one's webhooks prove and say, as facts of one vocabulary (payments: from event to fact).

No adapter reads a clock, a database, a broker or the network: bytes, headers and time go in, facts come out. What one
needs from the provider's API or a certificate's address is fetched by callables that it is given (``configured``).
"""
