-- API keys of the service, how often each was used, and which role of the database wrote an entry of the audit trail.

CREATE TABLE api_key (
    name text PRIMARY KEY,                  -- as in audit.key
    sha256 text NOT NULL UNIQUE,            -- hash of the key, hexadecimal
    scopes text[] NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    expires timestamptz,                    -- null = never
    per_minute integer CHECK (per_minute > 0)   -- searches and writes; null = no limit
);

-- Requests of the keys that have a limit. It is not worth a place in the write-ahead log: after a crash it is empty.
CREATE UNLOGGED TABLE key_use (
    key text NOT NULL,
    minute timestamptz NOT NULL,
    requests integer NOT NULL,
    PRIMARY KEY (minute, key)
);

ALTER TABLE audit ADD role text;            -- of the database; null in entries that are older than this column
ALTER TABLE audit ALTER role SET DEFAULT session_user;
CREATE INDEX audit_person ON audit ((facts ->> 'pid')) WHERE facts ? 'pid';
